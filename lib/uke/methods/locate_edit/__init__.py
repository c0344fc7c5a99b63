"""Locate-then-edit methods: find anchors and target vectors, solve for weights that meet them."""
