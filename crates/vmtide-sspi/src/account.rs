//! Users and their domains.

use std::net::IpAddr;

/// Domain (empty for none) and account of `user@domain.example`, `DOMAIN\user` or `user`.
pub fn split_user(user: &str) -> (&str, &str) {
    if let Some((domain, account)) = user.split_once('\\') {
        // `.` is how Windows writes "of this machine".
        return (if domain == "." { "" } else { domain }, account);
    }
    match user.rsplit_once('@') {
        Some((account, domain)) => (domain, account),
        None => ("", user),
    }
}

/// Whether Kerberos can be tried for `user` at `host`: the host must be called by its name, the user be of a domain, and
/// that domain be found. `has_kdc`: somebody said where; else the domain's name must be one of DNS, as a short one
/// (`LAB`) leads to no server.
pub fn may_try_kerberos(user: &str, host: &str, has_kdc: bool) -> bool {
    let (domain, _) = split_user(user);
    let is_named = host.parse::<IpAddr>().is_err();
    is_named && (domain.contains('.') || !domain.is_empty() && has_kdc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_all_forms() {
        for (user, parts) in [
            ("a@b.example", ("b.example", "a")),
            (r"B\a", ("B", "a")),
            (r".\a", ("", "a")),
            ("a", ("", "a")),
            ("x@y@b.example", ("b.example", "x@y")),
        ] {
            assert_eq!(split_user(user), parts);
        }
    }

    #[test]
    fn kerberos_needs_a_name_and_a_domain_that_can_be_found() {
        assert!(may_try_kerberos("u@lab.example", "hv1", false));
        assert!(may_try_kerberos(r"lab.example\u", "hv1.lab.example", false));
        assert!(!may_try_kerberos("u@lab.example", "192.0.2.1", true));
        assert!(!may_try_kerberos("u@lab.example", "fe80::1", true));
        assert!(!may_try_kerberos(r"LAB\u", "hv1", false));
        assert!(may_try_kerberos(r"LAB\u", "hv1", true));
        assert!(!may_try_kerberos(r".\u", "hv1", true));
        assert!(!may_try_kerberos("u", "hv1", true));
    }
}
