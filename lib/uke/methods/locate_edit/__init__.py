"""Locate-then-edit methods: find anchors and target vectors, then solve for weights that meet them."""
