"""The keys, grouped. One module a section; `trueup.config.schema` puts them together."""
