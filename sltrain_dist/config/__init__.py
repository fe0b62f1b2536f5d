"""The strict configuration: schema, presets, loading, and rules across fields."""
