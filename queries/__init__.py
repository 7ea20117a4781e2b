"""The graph store, the statistics store, the schema and the library of named queries."""
