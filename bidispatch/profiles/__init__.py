"""Hardware profiles: YAML files that say, for a GPU, which implementations to prefer and with which params."""
