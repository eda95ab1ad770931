//! A stand-in for `virtdisk.dll`, for tests only: the documented interface over image files and tracking of
//! our own, with the faults that the documentation names. Empty on systems other than Windows.
