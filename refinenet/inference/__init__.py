"""A trained network on whole images: scales and flips averaged, tiles, dense CRF, faster forms, export."""
