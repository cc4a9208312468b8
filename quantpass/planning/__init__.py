"""From a reading of a site to the operator call that replaces it, legal on a chip."""
