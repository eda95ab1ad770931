//! The virtual disk interface of Windows (`virtdisk.dll`) as safe, typed calls. On other systems the crate
//! holds only the types and errors.
