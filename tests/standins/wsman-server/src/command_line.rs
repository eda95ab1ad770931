//! The command line that the stand-ins' programs share: what a server is set up with, and orders while it runs.

use crate::{ChannelBinding, Kerberos, Schema, Server, ServerOptions, Switch, User};
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::Arc;
use vmtide_cim::Cim;

/// How a server is set up. Everything is told in arguments, passwords too: nothing here is secret.
#[derive(Debug, clap::Args)]
pub struct ServerArguments {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// Speak HTTPS with a certificate for these names.
    #[arg(long, value_delimiter = ',')]
    tls: Option<Vec<String>>,
    /// Sign the server's certificate with SHA-384.
    #[arg(long, requires = "tls")]
    tls_sha384: bool,
    /// A user as NAME:PASSWORD; with ":none" after it one without rights. May be repeated.
    #[arg(long, default_value = "admin:P4ssw0rd!")]
    user: Vec<String>,
    /// Offer Basic.
    #[arg(long)]
    basic: bool,
    /// Do not offer NTLM.
    #[arg(long)]
    no_ntlm: bool,
    /// Let certificates log their users in; one for the first user is written to --certificates.
    #[arg(long, requires = "tls")]
    certificates: Option<PathBuf>,
    /// Offer Kerberos with this keytab.
    #[arg(long)]
    keytab: Option<PathBuf>,
    /// The realm's krb5.conf.
    #[arg(long)]
    krb5_config: Option<PathBuf>,
    /// A Python that has the module gssapi.
    #[arg(long, default_value = "/usr/bin/python3")]
    python: PathBuf,
    /// Take messages over HTTP that are not sealed.
    #[arg(long)]
    allow_unencrypted: bool,
    /// How logins are tied to TLS: none, relaxed, strict.
    #[arg(long, default_value = "relaxed")]
    channel_binding: String,
    /// The largest envelope in KiB.
    #[arg(long, default_value_t = 500)]
    max_envelope_kib: usize,
    /// Do not insist on s:mustUnderstand, which pywinrm leaves out.
    #[arg(long)]
    lenient: bool,
    /// A fault to switch on from the beginning. May be repeated.
    #[arg(long)]
    fault: Vec<Switch>,
}

fn user(text: &str) -> Result<User, String> {
    let mut parts = text.splitn(3, ':');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(name), Some(password), Some("none")) => Ok(User::without_rights(name, password)),
        (Some(name), Some(password), None) => Ok(User::new(name, password)),
        (Some(name), Some(password), Some(rest)) => {
            Ok(User::new(name, &format!("{password}:{rest}")))
        }
        _ => Err(format!("{text:?} is not NAME:PASSWORD[:none]")),
    }
}

fn options(arguments: &ServerArguments) -> Result<ServerOptions, String> {
    let channel_binding = match arguments.channel_binding.as_str() {
        "none" => ChannelBinding::None,
        "relaxed" => ChannelBinding::Relaxed,
        "strict" => ChannelBinding::Strict,
        other => return Err(format!("there is no channel binding {other:?}")),
    };
    Ok(ServerOptions {
        listen: arguments.listen.clone(),
        tls_names: arguments.tls.clone(),
        tls_sha384: arguments.tls_sha384,
        basic: arguments.basic,
        ntlm: !arguments.no_ntlm,
        kerberos: arguments.keytab.clone().map(|keytab| Kerberos {
            python: arguments.python.clone(),
            keytab,
            config: arguments.krb5_config.clone(),
            without_rights: Vec::new(),
        }),
        certificates: arguments.certificates.is_some(),
        allow_unencrypted: arguments.allow_unencrypted,
        channel_binding,
        users: arguments.user.iter().map(|text| user(text)).collect::<Result<_, _>>()?,
        max_envelope_bytes: arguments.max_envelope_kib * 1024,
        require_must_understand: !arguments.lenient,
        ..ServerOptions::default()
    })
}

/// Serves a world until standard input ends. The first line printed is a JSON object that says where; each line of input
/// is a fault to switch on (`EFFECT[:OPERATION[:SKIP[:TIMES]]]`), `clear`, `log`, `expire` or `cut`, or one of the
/// world's own orders, and is answered with one line of JSON. `about` goes into the first line.
///
/// # Errors
/// What is wrong with the arguments, or why the server does not start, in a line.
pub fn serve(
    arguments: &ServerArguments,
    cim: Arc<dyn Cim>,
    schema: Arc<dyn Schema>,
    about: Value,
    mut order: impl FnMut(&str) -> Option<Value>,
) -> Result<(), String> {
    let options = options(arguments)?;
    let first = options.users.first().cloned().unwrap_or_else(|| User::new("", ""));
    let server = Server::start(options, cim, schema).map_err(|error| error.to_string())?;
    for switch in &arguments.fault {
        server.switches().add(switch.clone());
    }
    if let Some(directory) = &arguments.certificates {
        let pem = server.client_certificate(&first.name).map_err(|error| error.to_string())?;
        for (name, text) in [("client.pem", &pem.certificate), ("client.key", &pem.key)] {
            std::fs::write(directory.join(name), text).map_err(|error| error.to_string())?;
        }
    }
    print(&json!({
        "url": server.url(),
        "host": server.address().ip().to_string(),
        "port": server.address().port(),
        "user": first.name,
        "password": first.password,
        "authority": server.authority_pem(),
        "world": about,
    }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let answer = order(line.trim());
        print(&answer.unwrap_or_else(|| command(&server, line.trim())))?;
    }
    Ok(())
}

fn command(server: &Server, line: &str) -> Value {
    match line {
        "clear" => server.switches().clear(),
        "expire" => server.expire_enumerations(),
        "cut" => server.cut_connections(),
        "log" => {
            let log: Vec<_> = server
                .log()
                .iter()
                .map(|exchange| {
                    json!({
                        "connection": exchange.connection,
                        "operation": exchange.operation.map(|operation| format!("{operation:?}")),
                        "action": exchange.action,
                        "user": exchange.user.as_ref().map(|(name, _)| name),
                        "how": exchange.user.as_ref().map(|(_, how)| how),
                        "sealed": exchange.sealed,
                        "status": exchange.status,
                        "reason": exchange.reason,
                    })
                })
                .collect();
            return Value::Array(log);
        }
        fault => match fault.parse() {
            Ok(switch) => server.switches().add(switch),
            Err(why) => return json!({ "error": why }),
        },
    }
    json!({})
}

fn print(value: &Value) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).map_err(|error| error.to_string())
}
