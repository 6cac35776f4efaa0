"""The families of networks that a run can train: each is one file in this folder.

A family is a subclass of :class:`~batchshaping.training.networks.network.Network`. All files in this folder
are searched for families. The settings of a family are then options of the command line and settings in
files, and the names of its networks are values of the setting ``network``, by which the families are told
apart.
"""

from batchshaping.training.networks.families import FAMILIES, NETWORKS, network_settings
from batchshaping.training.networks.network import Network

__all__ = ["FAMILIES", "NETWORKS", "Network", "network_settings"]
