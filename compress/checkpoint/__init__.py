"""Files: the safetensors container, a source by tensor name, packed sites, the table in config.json."""
