"""Pictures from several machines, with engines that others made: docs/machines.md."""
