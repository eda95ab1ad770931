//! Delta streams: the changed data of a disk between two tracking ids, as a stream that can be checked,
//! stored, sent, merged and applied.
