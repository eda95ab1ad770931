//! The sample world behind the server, for independent clients and for trying things by hand.

use clap::Parser;
use std::process::ExitCode;
use std::sync::Arc;
use wsman_server::{command_line, sample};

/// A WS-Management server in front of a sample world. It runs until its standard input ends, and takes orders there: see
/// the module `command_line`.
#[derive(Parser)]
#[command(name = "standin-wsman-server")]
struct Arguments {
    #[command(flatten)]
    server: command_line::ServerArguments,
    /// How many disks the sample world has.
    #[arg(long, default_value_t = 10)]
    sample: usize,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let world = sample::World::new(arguments.sample);
    let schema = Arc::new(sample::schema());
    let about = serde_json::json!({ "disks": arguments.sample });
    match command_line::serve(&arguments.server, world, schema, about, |_| None) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("standin-wsman-server: {why}");
            ExitCode::FAILURE
        }
    }
}
