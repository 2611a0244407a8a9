"""Benchmarks: cases as data (`cases`), what runs them (`runner`), what they measured (`report`)."""
