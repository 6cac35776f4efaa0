"""The multiply-adds of a model, under the module path that they had before they moved to the gates."""

from batchshaping.gates.cost import MultiplyAdds, count_macs

__all__ = ["MultiplyAdds", "count_macs"]
