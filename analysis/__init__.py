"""The science on top of the stored graph: circuits, figures, reports."""
