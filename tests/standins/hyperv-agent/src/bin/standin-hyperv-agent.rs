//! A stand-in Hyper-V host with vmtide's agent on it, for trying things by hand.

use clap::Parser;
use serde_json::json;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use vmtide_standin_hyperv_host::{Random, VmSpec, World, WorldOptions};

/// A Hyper-V host with a VM and vmtide's agent. It says on its standard output where it listens and which keys it takes,
/// and runs until its standard input ends.
#[derive(Parser)]
#[command(name = "standin-hyperv-agent")]
struct Arguments {
    /// Where the volumes of the host lie (C:\VMs is VMs in the directory C in it), and the agent's keys and state.
    #[arg(long)]
    directory: PathBuf,
    /// The name of the VM; it has disks of 8 and 4 MiB.
    #[arg(long, default_value = "web")]
    vm: String,
    /// The seed of all ids.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let volumes = arguments.directory.join("volumes");
    // Nobody lets its time go on but those who ask it.
    let options = WorldOptions { seed: arguments.seed, tick_ms: 1000, ..WorldOptions::default() };
    let world = World::new(&volumes, options);
    world.add_switch("External");
    let vm = world.add_vm(&VmSpec::new(&arguments.vm, &[8 << 20, 4 << 20]));
    world.write_around(vm, &mut Random::new(arguments.seed), 50);
    let agent =
        hyperv_agent::HostAgent::start(&world, &volumes, &arguments.directory.join("agent"))?;
    let about = json!({
        "url": format!("hyperv://{}/{}", agent.address, arguments.vm),
        "fingerprint": agent.fingerprint,
        "read_key": agent.reader,
        "write_key": agent.writer,
    });
    println!("{about}");
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).map_err(|error| error.to_string())?;
    Ok(())
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("standin-hyperv-agent: {why}");
            ExitCode::FAILURE
        }
    }
}
