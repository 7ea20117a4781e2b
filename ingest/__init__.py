"""Jobs that measure a model and stream rows into the stores."""
