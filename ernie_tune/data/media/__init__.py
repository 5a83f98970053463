"""Pictures and clips to patches, and pictures spoilt on purpose."""
