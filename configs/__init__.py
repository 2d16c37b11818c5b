"""Every setting (schema.py), which go together (combinations.py), one YAML per recipe, and the bundled demo images."""
