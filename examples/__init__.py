"""Complete programs that use moba_cp; not part of the package."""
