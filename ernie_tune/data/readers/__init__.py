"""One row of any known format to one record."""
