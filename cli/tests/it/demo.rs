//! The README's first command walks its own tour.

use crate::program::{finish, selvage};

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
