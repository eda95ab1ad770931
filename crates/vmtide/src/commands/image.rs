//! Options and output that the commands over disk images share.

use crate::commands::vm::BackingArg;
use clap::{Args, ValueHint};
use std::path::PathBuf;
use vmtide_engine::image::OpenDiskOptions;
use vmtide_image::Format;

/// How the images that a command reads are opened.
#[derive(Clone, Debug, Args)]
pub struct OpenArgs {
    /// Which files an image may name as its parent or data file [default: same-directory where the
    /// format is given or said by the file's name, else refuse]
    #[arg(long, value_name = "WHICH")]
    pub backing: Option<BackingArg>,
    /// The format of parents whose child does not say it
    #[arg(long, value_name = "FORMAT")]
    pub backing_format: Option<Format>,
    /// Look for parents in this directory, too; may be repeated
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub search: Vec<PathBuf>,
    /// Take a parent that was changed after its child was made: what is read may be a mixture
    #[arg(long)]
    pub any_parent: bool,
}

impl OpenArgs {
    /// For an image of this format, where the user gives it.
    pub fn options(&self, format: Option<Format>) -> OpenDiskOptions {
        OpenDiskOptions {
            format,
            backing: self.backing.map(BackingArg::policy),
            backing_format: self.backing_format,
            search: self.search.clone(),
            any_parent: self.any_parent,
            snapshot: None,
        }
    }
}
