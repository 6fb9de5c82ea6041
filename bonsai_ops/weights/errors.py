"""The one error a user sees for a file that cannot be used; the one place where text from a file is made fit to show.

Names, texts and numbers of a file go into messages, logs and the page: whoever wrote the file must not write there.
"""

from __future__ import annotations

from pathlib import Path

KEY_LENGTH, FOUND_LENGTH, CURE_LENGTH = 160, 420, 620
"""Characters of the parts of a message. What is longer loses its middle."""
GAP = " .. "


def shown(text: str, length: int = KEY_LENGTH) -> str:
    """Text as one line of at most `length` characters: what cannot be printed is escaped, the middle is left out."""
    if len(text) > length:
        text = text[:length] + text[-length:]  # so that no more than that is escaped
    whole = escaped(text)
    if len(whole) <= length:
        return whole
    tail = (length - len(GAP)) // 3
    return whole[: length - len(GAP) - tail] + GAP + whole[len(whole) - tail :]


def escaped(text: str) -> str:
    """Text as one line: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TravellingError(Exception):
    """An error that another process gets as its sentence, in the built-in class that it is one of.

    Engines that spread work send errors by pickle. The one who reads it need not have this plugin, or has it under
    another name: ComfyUI calls it by its folder.
    """

    def __reduce__(self) -> tuple[type[Exception], tuple[str]]:
        built_in = next(kind for kind in type(self).__mro__ if kind.__module__ == "builtins")
        return built_in, (str(self),)


class PackError(TravellingError, ValueError):
    """A pack that cannot be used: "{name of the file}: {key}: {what was found}. {what was expected, cure} ({path})".

    The path comes last, for it is long, and is left out where it is no more than the name. `reason` is the message
    without both. It is one line whatever is handed in: see `shown`. A path is escaped, not cut.
    """

    __module__ = "bonsai"  # ComfyUI's dialog begins with it, and this module's own name has the path of the plugin

    def __init__(self, path: Path | str, found: str, cure: str, key: str | None = None) -> None:
        self.path, self.found, self.cure, self.key = Path(path), found, cure, key
        self.reason = f"{shown(found, FOUND_LENGTH)}. {shown(cure, CURE_LENGTH)}"
        if key:
            self.reason = f"{shown(key)}: {self.reason}"
        name, place = escaped(self.path.name or str(path)), escaped(str(path))
        super().__init__(f"{name}: {self.reason}" + (f" ({place})" if place != name else ""))
