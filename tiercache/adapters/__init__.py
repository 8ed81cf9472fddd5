"""Adapters: stores under the models of other libraries. Translations, nothing more; each is imported by its own name."""
