"""The support table: what is supported, told by the tests that prove it."""
