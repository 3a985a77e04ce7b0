"""A run or a record in the conventions of journals and catalogues: RO-Crate, Croissant, model cards, CodeMeta."""
