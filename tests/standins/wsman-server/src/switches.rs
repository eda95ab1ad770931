//! Faults that are switched on: what a real host does on a bad day.

use parking_lot::Mutex;
use std::str::FromStr;

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `wsmid:Identify`.
    Identify,
    /// A transfer `Get`.
    Get,
    /// The start of an enumeration.
    Enumerate,
    /// The next part of an enumeration.
    Pull,
    /// The early end of an enumeration.
    Release,
    /// A method.
    Invoke,
    /// A request without a body, which only logs in.
    Login,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// HTTP 401 whatever the credentials.
    Unauthorized,
    /// The fault of a user without rights.
    AccessDenied,
    /// The fault that an enumeration's context is not known (any more); of `Pull` only.
    ExpiredEnumeration,
    /// The fault that the operation took longer than `w:OperationTimeout`. It may have had its effect: it has.
    TimedOut,
    /// The connection ends before the operation is done.
    CutBefore,
    /// The operation is done, then the connection ends without an answer.
    CutAfter,
    /// The operation is done, then the connection ends in the middle of the answer.
    CutDuring,
    /// HTTP 500 without a body; the operation is not done.
    EmptyError,
    /// HTTP 503, as `HTTP.sys` answers while the service starts; the operation is not done.
    Unavailable,
    /// The operation is done; somebody on the way puts HTTP 401 in the place of the answer.
    UnauthorizedAfter,
    /// The operation is done; somebody on the way puts HTTP 503 in the place of the answer.
    UnavailableAfter,
    /// The operation is done; the answer is an envelope of 64 MiB.
    Oversized,
    /// The operation is done; the answer is no XML.
    Garbage,
    /// The operation is done; the answer is XML nested 20,000 deep.
    Nested,
    /// The answer comes in pieces of 16 bytes with pauses of 20 ms between them.
    Slow,
    /// The request is never answered; the connection stays open.
    Silent,
}

impl Effect {
    /// All, by the names of the command line.
    const NAMED: [(&'static str, Self); 16] = [
        ("unauthorized", Self::Unauthorized),
        ("access-denied", Self::AccessDenied),
        ("expired-enumeration", Self::ExpiredEnumeration),
        ("timed-out", Self::TimedOut),
        ("cut-before", Self::CutBefore),
        ("cut-after", Self::CutAfter),
        ("cut-during", Self::CutDuring),
        ("empty-error", Self::EmptyError),
        ("unavailable", Self::Unavailable),
        ("unauthorized-after", Self::UnauthorizedAfter),
        ("unavailable-after", Self::UnavailableAfter),
        ("oversized", Self::Oversized),
        ("garbage", Self::Garbage),
        ("nested", Self::Nested),
        ("slow", Self::Slow),
        ("silent", Self::Silent),
    ];

    /// The names that [`Switch`] is read from.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMED.iter().map(|(name, _)| *name)
    }
}

/// An effect with the requests that it hits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// What goes wrong.
    pub effect: Effect,
    /// With which operation; none for any.
    pub operation: Option<Operation>,
    /// How many requests that match go by first.
    pub skip: u32,
    /// How many are hit after that; none for all.
    pub times: Option<u32>,
}

impl Switch {
    /// An effect on every request.
    pub const fn always(effect: Effect) -> Self {
        Self { effect, operation: None, skip: 0, times: None }
    }

    /// An effect on the next `operation` only.
    pub const fn once(effect: Effect, operation: Operation) -> Self {
        Self { effect, operation: Some(operation), skip: 0, times: Some(1) }
    }
}

/// `EFFECT[:OPERATION[:SKIP[:TIMES]]]`, e.g. `cut-after:invoke:1:1`; an empty or `any` operation is any.
impl FromStr for Switch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let effect = Effect::NAMED.iter().find(|(known, _)| *known == name);
        let (_, effect) = effect.ok_or_else(|| format!("there is no fault {name:?}"))?;
        let operation = match parts.next() {
            None | Some("" | "any") => None,
            Some("identify") => Some(Operation::Identify),
            Some("get") => Some(Operation::Get),
            Some("enumerate") => Some(Operation::Enumerate),
            Some("pull") => Some(Operation::Pull),
            Some("release") => Some(Operation::Release),
            Some("invoke") => Some(Operation::Invoke),
            Some("login") => Some(Operation::Login),
            Some(other) => return Err(format!("there is no operation {other:?}")),
        };
        let number = |part: Option<&str>| {
            part.map(|text| text.parse::<u32>().map_err(|_| format!("{text:?} is no number")))
                .transpose()
        };
        let skip = number(parts.next())?.unwrap_or(0);
        let times = number(parts.next())?;
        if parts.next().is_some() {
            return Err(format!("{text:?} has too many parts"));
        }
        Ok(Self { effect: *effect, operation, skip, times })
    }
}

/// The switches of a server. Any thread may set them while it runs.
#[derive(Debug, Default)]
pub struct Switches(Mutex<Vec<Switch>>);

impl Switches {
    /// Adds one.
    pub fn add(&self, switch: Switch) {
        self.0.lock().push(switch);
    }

    /// Switches all off.
    pub fn clear(&self) {
        self.0.lock().clear();
    }

    /// What goes wrong with this request; counts it.
    pub(crate) fn hit(&self, operation: Operation) -> Option<Effect> {
        let mut switches = self.0.lock();
        let mut hit = None;
        for switch in switches.iter_mut() {
            if switch.operation.is_some_and(|wanted| wanted != operation) || hit.is_some() {
                continue;
            }
            if switch.skip > 0 {
                switch.skip -= 1;
                continue;
            }
            match &mut switch.times {
                Some(0) => continue,
                Some(times) => *times -= 1,
                None => {}
            }
            hit = Some(switch.effect);
        }
        switches.retain(|switch| switch.times != Some(0));
        hit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_hit_what_they_name_as_often_as_they_say() {
        let switches = Switches::default();
        switches.add("cut-after:invoke:1:2".parse().unwrap());
        let hits: Vec<_> = (0..5).map(|_| switches.hit(Operation::Invoke).is_some()).collect();
        assert_eq!(hits, [false, true, true, false, false]);
        assert_eq!(switches.hit(Operation::Get), None);
        switches.add(Switch::always(Effect::Silent));
        assert_eq!(switches.hit(Operation::Get), Some(Effect::Silent));
        assert_eq!("silent".parse(), Ok(Switch::always(Effect::Silent)));
        for bad in ["", "x", "slow:nothing", "slow:get:x", "slow:get:1:1:1"] {
            assert!(bad.parse::<Switch>().is_err(), "{bad}");
        }
    }
}
