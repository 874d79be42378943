"""Wire formats: one adapter per provider kind, all behind `actors.adapters.base.Adapter`."""
