//! All tests of the crate through its public interface, in one program: each program of its own would be linked with all of the
//! crate once more.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

mod support;

mod chain;
mod creators;
mod moved_files;
mod qcow2_check;
mod qcow2_crash;
mod qcow2_fuzz;
mod qcow2_hostile;
mod qcow2_read_interop;
mod qcow2_write_interop;
mod qcow2_writer_model;
mod refused_writes;
mod vhd_crash;
mod vhd_fuzz;
mod vhd_hostile;
mod vhd_images;
mod vhd_writer;
mod vhdx_crash;
mod vhdx_fuzz;
mod vhdx_hostile;
mod vhdx_images;
mod vhdx_log;
mod vhdx_read;
mod vhdx_write_interop;
mod vhdx_writer;
mod vmdk_check;
mod vmdk_crash;
mod vmdk_fuzz;
mod vmdk_hostile;
mod vmdk_read;
mod vmdk_write;
