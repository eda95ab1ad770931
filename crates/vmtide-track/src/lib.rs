//! Resilient change tracking for the disks that vmtide hosts itself: which blocks were written since a
//! tracking id was sealed, through planned stops, crashes and power loss.
