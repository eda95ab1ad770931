//! A stand-in Hyper-V host over WS-Management, for tests of whole commands and for trying things by hand.

use clap::Parser;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use vmtide_standin_hyperv_host::{Random, VmSpec, World, WorldOptions};
use wsman_server::command_line;

/// A Hyper-V host with a few VMs, served over WS-Management. It runs until its standard input ends, and takes orders
/// there: those of the server, and `advance MILLISECONDS`, `settle`, `write` (all guests write somewhere), `leftovers`,
/// `events`, `vms`.
#[derive(Parser)]
#[command(name = "standin-hyperv-host")]
struct Arguments {
    #[command(flatten)]
    server: command_line::ServerArguments,
    /// Where the volumes of the host lie: C:\VMs is VMs in the directory C in it.
    #[arg(long)]
    directory: PathBuf,
    /// VMs as NAME:MIB,MIB,...: their disks' sizes. May be repeated.
    #[arg(long, default_value = "web:8,4")]
    vm: Vec<String>,
    /// The seed of all ids.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn spec(text: &str) -> Result<VmSpec, String> {
    let wrong = || format!("{text:?} is not NAME:MIB,MIB,...");
    let (name, sizes) = text.split_once(':').ok_or_else(wrong)?;
    let sizes: Vec<u64> = sizes
        .split(',')
        .map(|size| size.parse::<u64>().map(|mib| mib << 20).map_err(|_| wrong()))
        .collect::<Result<_, _>>()?;
    Ok(VmSpec::new(name, &sizes))
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let options = WorldOptions { seed: arguments.seed, ..WorldOptions::default() };
    let world = World::new(&arguments.directory, options);
    let mut random = Random::new(arguments.seed);
    for vm in &arguments.vm {
        let vm = world.add_vm(&spec(vm)?);
        world.write_around(vm, &mut random, 50);
    }
    let about = vms(&world);
    let cim = world.cim();
    let order = |line: &str| order(&world, &mut random, line);
    command_line::serve(&arguments.server, cim, Arc::new(hyperv_winrm::HostSchema), about, order)
}

fn vms(world: &World) -> Value {
    let vms = world.vms().into_iter().map(|vm| {
        let disks: Vec<String> = world.disks(vm).into_iter().map(|(_, path)| path).collect();
        json!({ "id": vm.to_string(), "name": world.describe(vm), "disks": disks })
    });
    json!({ "vms": vms.collect::<Vec<_>>() })
}

/// An order to the world; none where it is none of its.
fn order(world: &World, random: &mut Random, line: &str) -> Option<Value> {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    Some(match word {
        "advance" => {
            world.advance(rest.parse().unwrap_or(0));
            json!({ "now_ms": world.now_ms() })
        }
        "settle" => {
            world.settle();
            json!({ "now_ms": world.now_ms() })
        }
        "write" => {
            for vm in world.vms() {
                world.write_around(vm, random, 8);
            }
            json!({})
        }
        "leftovers" => {
            let left = world.leftovers();
            json!({
                "recovery_snapshots": left.recovery_snapshots,
                "reference_points": left.reference_points,
                "unmerged_files": left.unmerged_files,
            })
        }
        "events" => json!(world.events()),
        "vms" => vms(world),
        _ => return None,
    })
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("standin-hyperv-host: {why}");
            ExitCode::FAILURE
        }
    }
}
