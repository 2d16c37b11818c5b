"""Every setting (schema.py), one YAML per recipe, and the bundled demo images."""
