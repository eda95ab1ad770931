//! The way to the host: how the user was proven, when the certificate ends, whether the clocks agree, and the way to the
//! files.

use crate::{Host, HostFiles};
use vmtide_cim::Link;
use vmtide_hypervisor::HealthCheck;

const NAME: &str = "network";

/// A certificate that ends within so many days is warned of.
const CERTIFICATE_DAYS: i64 = 30;

/// Clocks that differ by more make tickets of Kerberos useless: the domain's default.
const MAX_CLOCK_DIFFERENCE_S: i64 = 300;

const DAY_S: i64 = 86_400;

/// All of it. What was not reached yet says nothing, but for the files.
pub(super) fn examine(host: &Host, files: Option<&dyn HostFiles>) -> Vec<HealthCheck> {
    let now_s = host.options().clock.unix_s();
    let mut checks = Vec::new();
    if let Some(link) = host.cim().link() {
        checks.push(login(host, &link));
        let left_s = link.certificate_end_unix_s.map(|end_s| end_s - now_s);
        checks.extend(left_s.map(|left_s| certificate(left_s.div_euclid(DAY_S))));
    }
    let ahead_s = host.told_unix_s().map(|told_s| told_s - host.options().clock.unix_s());
    checks.extend(ahead_s.map(clock));
    checks.extend(files.map(HostFiles::examine_way).unwrap_or_default());
    checks
}

fn login(host: &Host, link: &Link) -> HealthCheck {
    let detail = format!("{} to {}, logged in by {}", link.protocol, host.peer(), link.login);
    match &link.fallback {
        None => HealthCheck::ok(NAME, detail),
        Some(why) => HealthCheck::warn(
            NAME,
            format!("{detail} instead of Kerberos: {why}"),
            "call the host by its full name in the domain, and see that the domain's servers answer; \
             --winrm-auth kerberos takes nothing weaker",
        ),
    }
}

fn certificate(days: i64) -> HealthCheck {
    let mend = "give the WinRM listener another certificate, and change --winrm-fingerprint where it is pinned";
    match days {
        ..0 => HealthCheck::warn(
            NAME,
            format!(
                "the host's certificate ended {} days ago, and is taken because it is pinned",
                -days
            ),
            mend,
        ),
        0..CERTIFICATE_DAYS => {
            HealthCheck::warn(NAME, format!("the host's certificate ends in {days} days"), mend)
        }
        _ => HealthCheck::ok(NAME, format!("the host's certificate is good for {days} days")),
    }
}

fn clock(ahead_s: i64) -> HealthCheck {
    let word = if ahead_s < 0 { "behind" } else { "ahead of" };
    let detail = format!("the host's clock is {} s {word} this machine's", ahead_s.abs());
    if ahead_s.abs() <= MAX_CLOCK_DIFFERENCE_S {
        return HealthCheck::ok(NAME, detail);
    }
    HealthCheck::warn(
        NAME,
        format!("{detail}: Kerberos takes no more than {MAX_CLOCK_DIFFERENCE_S} s"),
        "set both by one source of time: w32tm /resync on the host, NTP here",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_hypervisor::HealthState;

    #[test]
    fn ends_of_certificates_and_clocks_are_judged() {
        for (days, state) in [
            (-3, HealthState::Warn),
            (0, HealthState::Warn),
            (29, HealthState::Warn),
            (30, HealthState::Ok),
        ] {
            let check = certificate(days);
            assert_eq!((check.state, check.mend.is_some()), (state, state != HealthState::Ok));
        }
        for (ahead_s, state, part) in [
            (0, HealthState::Ok, "0 s ahead"),
            (-300, HealthState::Ok, "300 s behind"),
            (301, HealthState::Warn, "301 s ahead"),
            (-4000, HealthState::Warn, "4000 s behind"),
        ] {
            let check = clock(ahead_s);
            assert_eq!(check.state, state, "{ahead_s}");
            assert!(check.detail.contains(part), "{check:?}");
        }
    }
}
