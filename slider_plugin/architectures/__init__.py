"""The built-in families, one file each. Each is an entry point of this distribution, as a third party's would be."""
