//! What can't run fails before the first request, with its reasons.

use super::*;

#[tokio::test]
async fn an_import_that_nobody_offers_is_named() {
    let Err(ActivateError::Imports { missing }) = Guest::new("ungranted.wat").await.activate() else {
        panic!("it must not be activated")
    };
    assert_eq!(missing, ["acme:unknown/thing@1.0.0"]);
}

#[tokio::test]
async fn all_missing_imports_are_named_at_once() {
    let text = r#"(component
        (import "wasi:cli/environment@0.2.0" (instance))
        (import "acme:a/one@1.0.0" (instance))
        (import "acme:b/two@1.0.0" (instance (export "f" (func))))
        (import "bare" (func))
        (instance $handler)
        (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))"#;
    let mut guest = Guest::new("hello.wat").await;
    guest.code = wat::parse_str(text).unwrap().into();
    let Err(ActivateError::Imports { missing }) = guest.activate() else { panic!("it must not be activated") };
    assert_eq!(missing, ["acme:a/one@1.0.0", "acme:b/two@1.0.0", "bare"]);
}

#[tokio::test]
async fn an_import_of_another_shape_is_refused() {
    let text = r#"(component
        (import "wasi:cli/environment@0.2.0" (instance (export "get-environment" (func (result u64)))))
        (instance $handler)
        (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))"#;
    let mut guest = Guest::new("hello.wat").await;
    guest.code = wat::parse_str(text).unwrap().into();
    assert!(matches!(guest.activate(), Err(ActivateError::Mismatch(_))));
}

#[tokio::test]
async fn a_handler_without_its_function_is_refused() {
    let text = r#"(component (instance $h) (export "wasi:http/incoming-handler@0.2.0" (instance $h)))"#;
    let mut guest = Guest::new("hello.wat").await;
    guest.code = wat::parse_str(text).unwrap().into();
    assert!(matches!(guest.activate(), Err(ActivateError::NotHttp(_))));
}

#[test]
fn a_component_that_answers_no_requests_is_refused() {
    let Err(CompileError::NotHttp { exports }) = compiled(&CACHE, code("not_http.wat")) else {
        panic!("it must not compile")
    };
    assert_eq!(exports, ["answer"]);
}

#[test]
fn a_release_candidate_is_no_released_interface() {
    for name in ["wasi:http/incoming-handler@0.2.0-rc-2023-11-10", "wasi:http/handler@0.3.0-rc-2026-03-15"] {
        let text = format!(r#"(component (instance $h) (export "{name}" (instance $h)))"#);
        let Err(CompileError::NotHttp { exports }) = compiled(&CACHE, wat::parse_str(text).unwrap().into()) else {
            panic!("it must not compile")
        };
        assert_eq!(exports, [name]);
    }
}

#[test]
fn a_preview1_command_becomes_a_component_but_answers_no_requests() {
    let text = r#"(module
        (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 1)
        (func (export "_start")))"#;
    let Err(CompileError::NotHttp { exports }) = compiled(&CACHE, wat::parse_str(text).unwrap().into()) else {
        panic!("it must not compile")
    };
    assert_eq!(exports.len(), 1);
    assert!(exports[0].starts_with("wasi:cli/run@0.2."), "{exports:?}");
}

#[test]
fn a_core_module_without_an_interface_is_refused() {
    let reactor = r#"(module
        (import "wasi_snapshot_preview1" "random_get" (func (param i32 i32) (result i32)))
        (memory (export "memory") 1)
        (func (export "_initialize")))"#;
    let refused = compiled(&CACHE, wat::parse_str(reactor).unwrap().into());
    assert!(matches!(refused, Err(CompileError::NotHttp { exports }) if exports.is_empty()));
    let foreign = r#"(module (import "env" "f" (func)))"#;
    let refused = compiled(&CACHE, wat::parse_str(foreign).unwrap().into());
    assert!(matches!(refused, Err(CompileError::Adapt(_))));
}

#[test]
fn bytes_that_are_no_code_are_refused() {
    let mut broken = code("hello.wat").to_vec();
    broken.truncate(broken.len() / 2);
    assert!(matches!(compiled(&CACHE, broken.into()), Err(CompileError::Read(_))));
}

#[tokio::test]
async fn files_that_are_not_there_fail_at_activation() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "no directory").unwrap();
    for name in ["nothing", "file"] {
        let path = dir.path().join(name);
        let guest = Guest::new("hello.wat").await.with(|grants| grants.files = Some(path.clone()));
        let refused = guest.activate().map(drop).unwrap_err();
        assert!(matches!(&refused, ActivateError::Files { path: told, .. } if *told == path), "{refused:?}");
    }
}
