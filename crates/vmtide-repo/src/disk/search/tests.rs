//! Which of several places a block is read from.

use crate::context::RepoContext;
use crate::crypto::MasterKey;
use crate::disk::{DamagedPart, Heal, PackSet, write_damaged, write_forward, write_healed};
use crate::envelope::ObjectKind;
use crate::pack::{ChunkEntry, FrameEncoder, PackWriter};
use crate::store::MemoryStore;
use crate::{BLOCK_BYTES, Location, ObjectId};
use std::sync::Arc;

/// Blocks of each pack: two chunks, in a frame of their own each.
const BLOCKS: u32 = 4;

struct World {
    store: MemoryStore,
    context: Arc<RepoContext>,
}

fn at(pack: ObjectId, ordinal: u32) -> Location {
    Location { pack, ordinal }
}

impl World {
    fn new() -> Self {
        let store = MemoryStore::new();
        let context = Arc::new(RepoContext {
            store: Arc::new(store.clone()),
            subkeys: MasterKey::from_bytes([7; 32]).subkeys(),
            repository: ObjectId([9; 16]),
            chunk_size_bytes: 65536,
            sealed: true,
            damage: crate::context::DamageLog::default(),
            points: crate::point_list::PointCache::default(),
            retention: None,
        });
        Self { store, context }
    }

    fn pack(&self) -> ObjectId {
        let mut writer = PackWriter::create(&self.context).unwrap();
        let mut encoder = FrameEncoder::new(3).unwrap();
        for content in [1, 2] {
            let content = vec![content; 2 * BLOCK_BYTES];
            let chunk = ChunkEntry { id: self.context.subkeys.chunk_id(&content), blocks: 2 };
            let mut stored = Vec::new();
            let compression = encoder.encode(&content, &mut stored).unwrap();
            writer.append(&[chunk], compression, &mut stored).unwrap();
        }
        writer.finish().unwrap().id
    }

    fn damaged(&self, place: Location) {
        let frame = place.ordinal / 2;
        let part = DamagedPart {
            pack: place.pack,
            frame: Some(frame),
            first_block: frame * 2,
            blocks: 2,
            detail: "test".into(),
        };
        write_damaged(&self.context, "test", &[part]).unwrap();
    }

    fn damaged_as_a_whole(&self, pack: ObjectId) {
        let part = DamagedPart::whole(pack, "missing".into());
        write_damaged(&self.context, "test", &[part]).unwrap();
    }

    fn healed(&self, heals: &[Heal]) {
        write_healed(&self.context, "test", heals.to_vec()).unwrap();
    }

    fn remove(&self, pack: ObjectId) {
        self.context.store.remove(&ObjectKind::Pack.object_name(pack)).unwrap();
    }

    /// Where two blocks are read from; none where they are lost.
    fn find(&self, place: Location) -> Option<Location> {
        let packs = PackSet::new(Arc::clone(&self.context));
        let traced = packs.trace(place, 2, true, &mut |_| {}).unwrap();
        assert!((1..=2).contains(&traced.count));
        traced.place.ok().map(|(pack, ordinal)| at(pack.id(), ordinal))
    }

    fn lift_all(&self) {
        for name in self.store.names() {
            if name.starts_with("damaged/") {
                self.context.store.remove(&name).unwrap();
            }
        }
    }
}

#[test]
fn an_original_that_is_sound_after_all_comes_before_what_healed_it() {
    let world = World::new();
    let (first, second) = (world.pack(), world.pack());
    world.damaged(at(first, 0));
    world.healed(&[(at(first, 0), 2, at(second, 2))]);
    assert_eq!(world.find(at(first, 0)), Some(at(second, 2)));
    assert_eq!(world.find(at(first, 1)), Some(at(second, 3)));
    assert_eq!(world.find(at(first, 2)), Some(at(first, 2)), "nothing was wrong with it");
    world.lift_all();
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)));
    world.damaged(at(second, 2));
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)));
    // A backup heals the second place by the first, which leads back to it.
    world.healed(&[(at(second, 2), 2, at(first, 0))]);
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)));
    assert_eq!(world.find(at(second, 2)), Some(at(first, 0)));
    // Both damaged now: no circle, and what can be opened is tried.
    world.damaged(at(first, 0));
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)));
    assert_eq!(world.find(at(second, 2)), Some(at(second, 2)));
    world.remove(first);
    assert_eq!(world.find(at(first, 0)), Some(at(second, 2)));
    world.remove(second);
    assert_eq!(world.find(at(first, 0)), None);
}

#[test]
fn a_second_place_that_is_back_comes_before_a_damaged_original() {
    let world = World::new();
    let (first, second) = (world.pack(), world.pack());
    world.damaged(at(first, 0));
    world.healed(&[(at(first, 0), 2, at(second, 2))]);
    world.damaged_as_a_whole(second);
    assert_eq!(world.find(at(first, 0)), Some(at(second, 2)));
    // It is back with damage of its own.
    world.damaged(at(second, 2));
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)));
    // The original was away and is back, too.
    world.lift_all();
    world.damaged_as_a_whole(first);
    world.damaged_as_a_whole(second);
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)));
}

#[test]
fn a_second_place_that_does_not_lead_to_the_block_heals_nothing() {
    let world = World::new();
    let (first, second, moved) = (world.pack(), world.pack(), world.pack());
    world.healed(&[(at(first, 0), 2, at(second, 2))]);
    // Repacked when nobody needed the block.
    write_forward(&world.context, second, &[(0, 2, at(moved, 0))]).unwrap();
    world.remove(second);
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)));
    world.damaged(at(first, 0));
    assert_eq!(world.find(at(first, 0)), Some(at(first, 0)), "it may still be read");
    // A third place that has it.
    let third = world.pack();
    world.healed(&[(at(first, 0), 2, at(third, 0))]);
    assert_eq!(world.find(at(first, 0)), Some(at(third, 0)));
    world.remove(third);
    // A run that leads past the end of a pack.
    world.healed(&[(at(first, 0), 2, at(moved, BLOCKS - 1))]);
    assert_eq!(world.find(at(first, 1)), Some(at(first, 1)));
}

#[test]
fn what_is_missing_leads_on_without_a_record_and_names_itself() {
    let world = World::new();
    let (first, second) = (world.pack(), world.pack());
    world.healed(&[(at(first, 0), 4, at(second, 0))]);
    world.remove(first);
    assert_eq!(world.find(at(first, 1)), Some(at(second, 1)));
    world.remove(second);
    let packs = PackSet::new(Arc::clone(&world.context));
    let traced = packs.trace(at(first, 1), 1, true, &mut |_| {}).unwrap();
    assert_eq!(traced.last, at(first, 1));
    let error = traced.place.map(drop).unwrap_err().to_string();
    assert!(error.contains(&first.to_string()), "{error}");
    assert!(world.context.damage.noted().iter().all(|(pack, _)| *pack == first));
}

#[test]
fn where_a_record_of_damage_cannot_be_read_what_was_healed_comes_first() {
    let world = World::new();
    let (first, second) = (world.pack(), world.pack());
    world.damaged(at(first, 0));
    world.healed(&[(at(first, 0), 2, at(second, 0))]);
    let name = world.store.names().into_iter().find(|name| name.starts_with("damaged/")).unwrap();
    let mut bytes = world.store.bytes(&name).unwrap().to_vec();
    bytes[70] ^= 1;
    world.store.replace(&name, &bytes);
    assert_eq!(world.find(at(first, 0)), Some(at(second, 0)));
    assert_eq!(world.find(at(first, 2)), Some(at(first, 2)));
}

#[test]
fn forwards_in_a_circle_end() {
    let world = World::new();
    let (first, second) = (world.pack(), world.pack());
    write_forward(&world.context, first, &[(0, 4, at(second, 0))]).unwrap();
    write_forward(&world.context, second, &[(0, 4, at(first, 0))]).unwrap();
    world.remove(first);
    world.remove(second);
    assert_eq!(world.find(at(first, 0)), None);
}
