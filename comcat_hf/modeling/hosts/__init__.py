"""The attention and MLP classes of each library, as rows of plain data."""
