//! The README's first command walks its own tour.

use std::os::unix::fs::PermissionsExt;

use crate::program::{Serving, finish, selvage};

#[test]
fn the_demo_passes_its_own_tour() {
    let mut command = selvage();
    command.args(["demo", "--check", "--port", "20443"]);
    if let Some(examples) = std::env::var_os("SELVAGE_TEST_EXAMPLES") {
        command.arg("--examples").arg(examples);
    }
    let output = finish(&mut command);
    let text = String::from_utf8_lossy(&output.stdout);
    eprintln!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "a stop failed:\n{text}");
    assert_eq!(text.matches("\nok ").count() + usize::from(text.starts_with("ok ")), 12, "{text}");
}

#[test]
fn a_demo_starts_again_from_its_own_directory() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    for _ in 0..2 {
        let demo = Serving::start(selvage().args(["demo", "--port", "22443", "--state-dir"]).arg(&state));
        assert!(demo.stop());
    }
    for key in ["certs/cosign.key", "certs/operator.key", "certs/ca-key.pem", "apps/gate/es256.pem"] {
        let mode = std::fs::metadata(state.join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{key} may be read by others");
    }
}
