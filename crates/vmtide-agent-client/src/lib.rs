//! A client of the agent: a disk on another host as a block device, with its change tracking.
