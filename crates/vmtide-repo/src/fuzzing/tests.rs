//! Mutated seeds, so that the targets themselves are known to reach behind the hashes.

use super::forge::FORGED;
use super::*;
use crate::disk::Forward;
use crate::pack::Pack;
use proptest::prelude::*;

type Target = (&'static str, fn(&[u8]));

fn targets() -> [Target; 7] {
    [
        ("repo_map_segment", map_segment),
        ("repo_index_segment", index_segment),
        ("repo_pack", pack),
        ("repo_point", restore_point),
        ("repo_forward", forward),
        ("repo_config", config),
        ("repo_key_slot", key_slot),
    ]
}

fn seed_of(target: &str, name: &str) -> Vec<u8> {
    let mut found = seeds().unwrap();
    found.retain(|seed| seed.target == target && seed.name == name);
    found.pop().unwrap().bytes
}

#[test]
fn every_target_has_a_seed_and_every_seed_a_target() {
    let seeds = seeds().unwrap();
    for (name, _) in targets() {
        assert!(seeds.iter().any(|seed| seed.target == name), "{name}");
    }
    for seed in &seeds {
        assert!(targets().iter().any(|(name, _)| *name == seed.target), "{}", seed.target);
        assert!(seed.bytes.len() < 16 << 10, "{} {}", seed.target, seed.name);
    }
}

/// The corpora in the tree are those of [`seeds`]; `VMTIDE_WRITE_SEEDS=1` makes them anew.
#[test]
fn seeds_are_in_the_tree() {
    let home = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    for seed in seeds().unwrap() {
        let file = home.join(seed.target).join(seed.name);
        if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, &seed.bytes).unwrap();
        }
        let length = std::fs::metadata(&file).map(|found| found.len()).ok();
        assert!(length.is_some_and(|length| length > 0), "{} is missing", file.display());
    }
}

#[test]
fn seeds_of_segments_are_sound() {
    let index = seed_of("repo_index_segment", "segment");
    let object = forge(ObjectKind::IndexSegment, &index).unwrap().open().unwrap();
    assert_eq!(fuzz_segment(object, &index), 400);
    let map = seed_of("repo_map_segment", "segment");
    let object = forge(ObjectKind::MapSegment, &map).unwrap().open().unwrap();
    let segment = MapSegment::from_object(object).unwrap();
    assert_eq!(segment.run_count(), 85);
    segment.for_each_run(&mut |_| Ok(())).unwrap();
}

#[test]
fn the_seed_of_a_pack_is_sound() {
    let forged = forge(ObjectKind::Pack, &seed_of("repo_pack", "pack")).unwrap();
    let pack = Pack::from_object(&forged.context, forged.open().unwrap()).unwrap();
    let mut decoder = crate::pack::FrameDecoder::new().unwrap();
    let (mut stored, mut out) = (Vec::new(), Vec::new());
    assert_eq!((pack.frames().len(), pack.chunk_count()), (2, 3));
    for number in 0..2 {
        pack.read_stored(number..number + 1, &mut stored).unwrap();
        out.resize(pack.content_length(number), 0);
        pack.decode_and_compare(number, &mut stored, &mut out, &mut decoder).unwrap();
    }
}

#[test]
fn seeds_of_points_forwards_and_documents_are_sound() {
    for (kind, target) in [(ObjectKind::Point, "repo_point"), (ObjectKind::Forward, "repo_forward")]
    {
        let forged = forge(kind, &seed_of(target, "object")[1..]).unwrap();
        match kind {
            ObjectKind::Point => drop(crate::point::read(&forged.context, FORGED).unwrap()),
            _ => {
                let forward = Forward::open(&forged.context, crate::envelope::NO_OWNER, FORGED)
                    .unwrap()
                    .unwrap();
                assert_eq!(forward.find(8, 9).unwrap().1, 1);
            }
        }
    }
    let point = sections::json_point(&seed_of("repo_point", "json")[1..]).unwrap();
    assert_eq!(crate::point::read(&point.context, FORGED).unwrap().vm, "web");
    let forward = sections::plain_forward(&seed_of("repo_forward", "content")[1..]).unwrap();
    let forward =
        Forward::open(&forward.context, crate::envelope::NO_OWNER, FORGED).unwrap().unwrap();
    assert_eq!(forward.find(7, 200).unwrap().1, 100);
    for name in ["plain", "encrypted"] {
        RepositoryConfig::decode(&with_checksum(&seed_of("repo_config", name))).unwrap();
    }
    let slot = with_checksum(&seed_of("repo_key_slot", "slot"));
    assert!(crate::keys::fuzz_slot(&slot), "the seed of a key slot is not taken");
}

/// A few kilobytes that ask for much memory: refused before it is taken.
#[test]
fn what_grows_beyond_its_kind_is_refused() {
    let warning = |length: usize| {
        let json = String::from_utf8(seed_of("repo_point", "json")[1..].to_vec()).unwrap();
        let json = json.replace("tracking lost", &"x".repeat(length));
        let forged = sections::json_point(json.as_bytes()).unwrap();
        crate::point::read(&forged.context, FORGED)
    };
    assert_eq!(warning((8 << 20) - 2000).unwrap().warnings.len(), 1);
    let error = warning(8 << 20).unwrap_err();
    assert!(error.to_string().contains("does not decompress"), "{error}");

    let objects = |count: usize| {
        let json = String::from_utf8(seed_of("repo_point", "json")[1..].to_vec()).unwrap();
        let more = format!("\"config\":{{\"more\":[{}0],", r#"{"":0},"#.repeat(count));
        let forged = sections::json_point(json.replace("\"config\":{", &more).as_bytes()).unwrap();
        crate::point::read(&forged.context, FORGED)
    };
    assert!(objects(65_000).is_ok());
    let error = objects(65_536).unwrap_err();
    assert!(error.to_string().contains("JSON objects"), "{error}");

    let kinds = [ObjectKind::Pack, ObjectKind::Point, ObjectKind::Forward, ObjectKind::MapSegment];
    for (kind, taken) in kinds.into_iter().zip([false, false, false, true]) {
        let directory = vec![0; (16 << 20) + 1];
        let object = forge::put(kind, &[], &directory, (0, 0)).unwrap().open();
        assert_eq!(object.is_some(), taken, "{kind:?}");
    }
}

#[test]
fn mutations_of_seeds_are_harmless() {
    for seed in seeds().unwrap() {
        let target = targets().into_iter().find(|(name, _)| *name == seed.target).unwrap().1;
        // A byte in the middle of noise says no more than its neighbours.
        let step = (seed.bytes.len() / 500).max(1);
        for at in (0..seed.bytes.len()).step_by(step) {
            let mut bytes = seed.bytes.clone();
            for value in [0, 1, 0x7f, 0xff] {
                bytes[at] = value;
                target(&bytes);
            }
            if at / step % 16 == 0 {
                target(&seed.bytes[..at]);
            }
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_harmless(input in prop::collection::vec(any::<u8>(), 0..400)) {
        for (_, target) in targets() {
            target(&input);
        }
    }
}
