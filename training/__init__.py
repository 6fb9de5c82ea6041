"""How the seedling was made: the small Bonsai that ships with the project. `python -m training` runs every stage."""
