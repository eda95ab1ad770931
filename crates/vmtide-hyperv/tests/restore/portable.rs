//! A property: whatever VM is described, defined anew it is described the same.

use crate::fake::{FakeHost, Manners, SystemBuilder, guid};
use crate::support::{config_of, origin, request, restore, restorer};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;
use vmtide_cim::CimValue;
use vmtide_hypervisor::{RestoreRoute, VmConfig};

#[derive(Clone, Debug)]
struct Shape {
    generation: u8,
    controllers: BTreeSet<u8>,
    /// Places on IDE and SCSI, of which those that the shape has are taken.
    places: BTreeSet<(u8, u8)>,
    dvds: BTreeSet<(u8, u8)>,
    adapters: Vec<(u32, bool, bool)>,
    memory: (u64, Option<(u64, u64)>),
    processors: u64,
    manners: (bool, bool, bool),
}

fn shape() -> impl Strategy<Value = Shape> {
    let places = || prop::collection::btree_set((0..6u8, 0..64u8), 0..10);
    (
        1..=2u8,
        prop::collection::btree_set(1..200u8, 0..4),
        places(),
        places(),
        prop::collection::vec((any::<u32>(), any::<bool>(), any::<bool>()), 0..4),
        (16..4096u64, prop::option::of((8..16u64, 4096..8192u64))),
        1..64u64,
        any::<(bool, bool, bool)>(),
    )
        .prop_map(
            |(generation, controllers, places, dvds, adapters, memory, processors, manners)| {
                Shape {
                    generation,
                    controllers,
                    places,
                    dvds,
                    adapters,
                    memory,
                    processors,
                    manners,
                }
            },
        )
}

/// The end of the id of controller `number`: 0 and 1 are IDE, the others SCSI; none where there is none.
fn controller(shape: &Shape, number: u8) -> Option<String> {
    match number {
        0 | 1 => (shape.generation == 1)
            .then(|| format!(r"83f8638b-8dca-4152-9eda-2ca8b33039b4\{number}")),
        other => {
            let id = shape.controllers.iter().nth(usize::from(other) - 2)?;
            Some(format!(r"{}\0", guid((*id).into())))
        }
    }
}

fn build(shape: &Shape) -> crate::fake::System {
    let mut builder = SystemBuilder::new(Uuid::from_u128(0xABC), "any", shape.generation);
    for id in &shape.controllers {
        builder = builder.scsi((*id).into());
    }
    let mut taken = BTreeSet::new();
    for (kind, places) in [(17, &shape.places), (16, &shape.dvds)] {
        for (number, location) in places {
            let Some(end) = controller(shape, *number) else { continue };
            let location = if *number < 2 { location % 2 } else { *location };
            if taken.insert((*number, location)) {
                let file = format!(r"C:\VMs\{number}-{location}.vhdx");
                builder = builder.drive(&end, location.into(), kind, (kind == 17).then_some(&file));
            }
        }
    }
    for (index, (mac, is_static, is_connected)) in shape.adapters.iter().enumerate() {
        let mac = format!("00155D{:06X}", (mac & 0xFF_FFF0) + u32::try_from(index).unwrap());
        let name = format!("Adapter {index}");
        let switch = is_connected.then_some("LAN");
        builder = builder.adapter(0xE00 + index as u128, &name, &mac, *is_static, switch);
    }
    let mut system = builder.build();
    for one in &mut system.resources {
        if one.class == "Msvm_MemorySettingData" {
            let (start, bounds) = shape.memory;
            let (least, most) = bounds.unwrap_or((start, start));
            one.set("VirtualQuantity", CimValue::Uint64(start * 2));
            one.set("Reservation", CimValue::Uint64(least * 2));
            one.set("Limit", CimValue::Uint64(most * 2));
            one.set("DynamicMemoryEnabled", bounds.is_some());
        } else if one.class == "Msvm_ProcessorSettingData" {
            one.set("VirtualQuantity", CimValue::Uint64(shape.processors));
        }
    }
    system
}

/// What must come back, in a form that does not depend on ids that the host gives.
fn essence(config: &VmConfig) -> impl PartialEq + std::fmt::Debug {
    let disks: BTreeMap<_, _> =
        config.disks.iter().map(|disk| (disk.id.clone(), disk.bus as u8)).collect();
    let mut adapters: Vec<_> = config
        .network_adapters
        .iter()
        .map(|one| {
            let is_static = one.static_mac == Some(true);
            (
                one.name.clone(),
                one.model.clone(),
                is_static,
                one.mac.clone().filter(|_| is_static),
                one.network.clone(),
            )
        })
        .collect();
    adapters.sort();
    (
        (config.machine.clone(), config.firmware, config.processors),
        (config.memory_bytes, config.dynamic_memory),
        config.controllers.clone(),
        disks,
        adapters,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 64, ..ProptestConfig::default() })]
    #[test]
    fn a_vm_that_is_defined_anew_is_described_as_it_was(shape in shape(), keeps_settings in any::<bool>()) {
        let system = build(&shape);
        let mut config = config_of(&system, &origin(&system));
        config.native.retain(|file| keeps_settings && !file.name.contains("vmcx"));
        let (state, fake) = (tempfile::tempdir().unwrap(), FakeHost::new());
        let (jobs, silent, text) = shape.manners;
        fake.change(|state| state.manners = Manners { jobs, silent, text, refuses_imports: None });
        let mut wanted = request(&config, "any", RestoreRoute::Portable);
        wanted.networks.connect = true;
        // The VM itself comes back, also where only the portable configuration is there.
        wanted.identity = vmtide_hypervisor::VmIdentity::Original;
        let done = restore(&restorer(&fake, state.path()), &wanted).unwrap();
        fake.change(|state| state.manners = Manners::default());
        let host = fake.host();
        let vm = host.vm(Uuid::parse_str(&done.id).unwrap()).unwrap();
        let now = host.configuration(&vm, &vm.settings).unwrap().config;
        prop_assert_eq!(essence(&now), essence(&config));
        let dvds = |system: &crate::fake::System| {
            system.of_class("Msvm_ResourceAllocationSettingData").filter(|one| one.number::<u16>("ResourceType") == Ok(16)).count()
        };
        let made = dvds(&fake.0.lock().systems[0]);
        prop_assert_eq!(made, if keeps_settings { dvds(&system) } else { 0 });
    }
}
