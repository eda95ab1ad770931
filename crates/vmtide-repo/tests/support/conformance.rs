//! What every object store promises, asked of each of them. Included by the tests of each crate that
//! has a store.

#![allow(
    missing_docs,
    dead_code,
    unused_variables,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::allow_attributes_without_reason,
    reason = "a test: what fails here fails the test; each crate uses what its stores promise"
)]

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};
use vmtide_repo::{ObjectEntry, ObjectStore, RepoError, read_small};

/// What not every store can promise.
#[derive(Clone, Copy)]
pub struct Promises {
    /// That one of several writers of a name wins, even at the same moment.
    pub one_winner: bool,
    /// That nothing is replaced.
    pub no_replacement: bool,
    /// That locks exclude each other.
    pub locks: bool,
}

impl Promises {
    /// All of them.
    pub const ALL: Self = Self { one_winner: true, no_replacement: true, locks: true };
}

/// A store and what keeps it alive.
pub struct Subject {
    pub store: Arc<dyn ObjectStore>,
    pub promises: Promises,
    pub guard: Option<Box<dyn Any>>,
}

fn names(store: &dyn ObjectStore, prefix: &str) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    store
        .list(prefix, &mut |entry| {
            found.push((entry.name, entry.length_bytes));
            Ok(())
        })
        .unwrap();
    found.sort();
    found
}

pub fn what_is_put_is_read_back_whole_and_in_parts(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        let content: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let mut writer = store.create("packs/ab/abcd").unwrap();
        for part in content.chunks(70_001) {
            writer.write(part).unwrap();
        }
        writer.finish().unwrap();
        let reader = store.open("packs/ab/abcd").unwrap();
        assert_eq!(reader.length_bytes(), 300_000);
        let mut part = [0; 1000];
        reader.read_at(&mut part, 299_000).unwrap();
        assert_eq!(part[..], content[299_000..]);
        assert_eq!(read_small(&*store, "packs/ab/abcd", 300_000).unwrap(), content);
        let error = read_small(&*store, "packs/ab/abcd", 299_999).unwrap_err();
        assert!(error.is_damage(), "{error}");
        store.put("empty", b"").unwrap();
        assert_eq!(read_small(&*store, "empty", 0).unwrap(), b"");
    }
}

pub fn reading_past_the_end_is_damage(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        store.put("points/a", &[7; 100]).unwrap();
        let reader = store.open("points/a").unwrap();
        for offset in [1, 100, 101, u64::MAX - 10, u64::MAX] {
            let error = reader.read_at(&mut [0; 100], offset).unwrap_err();
            assert!(error.is_damage(), "{offset}: {error}");
            assert!(error.to_string().contains("points/a"), "{error}");
        }
        reader.read_at(&mut [], 100).unwrap();
    }
}

pub fn an_object_is_not_there_before_it_is_finished_nor_when_it_is_dropped(
    subjects: &dyn Fn() -> Vec<Subject>,
) {
    for Subject { store, promises, .. } in subjects() {
        let mut writer = store.create("points/p").unwrap();
        writer.write(&[1; 200_000]).unwrap();
        assert!(matches!(store.open("points/p"), Err(RepoError::NotFound { .. })));
        assert!(names(&*store, "points/").is_empty());
        drop(writer);
        assert!(names(&*store, "points/").is_empty());
        store.put("points/p", b"whole").unwrap();
        assert_eq!(names(&*store, "points/"), [("points/p".to_owned(), 5)]);
    }
}

pub fn nothing_is_ever_replaced(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        if !promises.no_replacement {
            continue;
        }
        store.put("maps/m", b"first").unwrap();
        let error = store.put("maps/m", b"second").unwrap_err();
        assert!(matches!(error, RepoError::AlreadyExists { .. }), "{error}");
        assert!(error.to_string().contains("maps/m"), "{error}");
        assert_eq!(read_small(&*store, "maps/m", 100).unwrap(), b"first");
    }
}

pub fn of_many_who_create_one_name_exactly_one_wins(subjects: &dyn Fn() -> Vec<Subject>) {
    const WRITERS: u8 = 8;
    for Subject { store, promises, .. } in subjects() {
        if !promises.one_winner {
            continue;
        }
        for round in 0..10 {
            let name = format!("index/{round}");
            let barrier = Barrier::new(WRITERS.into());
            let won: Vec<u8> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..WRITERS)
                    .map(|writer| {
                        let (store, name, barrier) = (&store, &name, &barrier);
                        scope.spawn(move || {
                            let mut object = store.create(name).unwrap();
                            object.write(&[writer; 50_000]).unwrap();
                            barrier.wait();
                            match object.finish() {
                                Ok(()) => Some(writer),
                                Err(RepoError::AlreadyExists { .. }) => None,
                                Err(error) => panic!("{error}"),
                            }
                        })
                    })
                    .collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(won.len(), 1, "{won:?}");
            let content = read_small(&*store, &name, 50_000).unwrap();
            assert_eq!(content, vec![won[0]; 50_000]);
        }
    }
}

pub fn listing_goes_below_its_prefix_and_nowhere_else(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        for name in ["packs/00/a", "packs/00/b", "packs/ff/c", "points/p", "packs2/x"] {
            store.put(name, name.as_bytes()).unwrap();
        }
        let found: Vec<String> = names(&*store, "packs/").into_iter().map(|n| n.0).collect();
        assert_eq!(found, ["packs/00/a", "packs/00/b", "packs/ff/c"]);
        assert_eq!(names(&*store, "packs/ff/").len(), 1);
        assert!(names(&*store, "maps/").is_empty());
        let error =
            store.list("packs/", &mut |_| Err(RepoError::Invalid("stop".into()))).unwrap_err();
        assert_eq!(error.to_string(), "stop");
    }
}

pub fn a_listing_says_when_each_object_was_written(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        store.put("leases/first", b"1").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        store.put("leases/second", b"2").unwrap();
        let mut times = BTreeMap::new();
        let mut visit = |entry: ObjectEntry| {
            times.insert(entry.name, entry.modified);
            Ok(())
        };
        store.list("leases/", &mut visit).unwrap();
        let apart = times["leases/second"].duration_since(times["leases/first"]);
        assert!((1..30).contains(&apart.as_secs()), "{times:?}");
    }
}

pub fn a_visitor_may_remove_what_it_is_shown(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        for n in 0..50 {
            store.put(&format!("forward/{n}"), b"x").unwrap();
        }
        store.list("forward/", &mut |entry| store.remove(&entry.name)).unwrap();
        assert!(names(&*store, "forward/").is_empty());
    }
}

pub fn removing_twice_is_no_error_and_an_open_reader_goes_on(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        store.put("packs/ab/x", b"content").unwrap();
        let reader = store.open("packs/ab/x").unwrap();
        store.remove("packs/ab/x").unwrap();
        store.remove("packs/ab/x").unwrap();
        store.remove("packs/cd/never").unwrap();
        assert!(matches!(store.open("packs/ab/x"), Err(RepoError::NotFound { .. })));
        let mut content = [0; 7];
        reader.read_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"content");
    }
}

pub fn names_that_are_paths_are_refused_everywhere(subjects: &dyn Fn() -> Vec<Subject>) {
    for Subject { store, promises, .. } in subjects() {
        for name in ["../x", "/x", "tmp/x", "", "a//b", ".x"] {
            let refused = |error: RepoError| assert!(matches!(error, RepoError::Invalid(_)));
            refused(store.create(name).map(drop).unwrap_err());
            refused(store.open(name).map(drop).unwrap_err());
            refused(store.put(name, b"").unwrap_err());
            refused(store.remove(name).unwrap_err());
            refused(store.list(&format!("{name}/"), &mut |_| Ok(())).unwrap_err());
        }
        assert!(store.list("packs", &mut |_| Ok(())).is_err());
    }
}

/// Names all tests of this module, for the crate that includes it.
#[macro_export]
macro_rules! conformance_tests {
    ($subjects:path) => {
        conformance_tests!(
            $subjects:
            what_is_put_is_read_back_whole_and_in_parts,
            reading_past_the_end_is_damage,
            an_object_is_not_there_before_it_is_finished_nor_when_it_is_dropped,
            nothing_is_ever_replaced,
            of_many_who_create_one_name_exactly_one_wins,
            listing_goes_below_its_prefix_and_nowhere_else,
            a_listing_says_when_each_object_was_written,
            a_visitor_may_remove_what_it_is_shown,
            removing_twice_is_no_error_and_an_open_reader_goes_on,
            names_that_are_paths_are_refused_everywhere,
        );
    };
    ($subjects:path: $($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                $crate::conformance::$name(&$subjects);
            }
        )*
    };
}
