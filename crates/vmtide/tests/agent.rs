//! The agent from outside: the contract of rct-service and everything around it, by `tests/agent/run.py`, whose matrix
//! also runs against the build for Windows.

use std::process::Command;

#[test]
fn the_contract_holds() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/agent/run.py");
    let done = Command::new("python3")
        .arg(script)
        .env("VMTIDE_BIN", env!("CARGO_BIN_EXE_vmtide"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("python3 is needed for this test (apt install python3)");
    let shown = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{shown}\n{}", String::from_utf8_lossy(&done.stderr));
    assert!(shown.contains("test result: ok."), "{shown}");
}
