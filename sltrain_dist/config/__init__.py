"""The strict configuration: schema, presets, loading, cross-field rules."""
