//! The limits of guests of WASI 0.3: the same as of 0.2, though their event loop runs inside the engine.

use selvage_node::fault::GuestFault;

use super::*;

/// A component of `wasi:http/handler@0.3.0` whose handler is `code`, a core function from the request's handle to the
/// address of its result.
fn handler(code: &str) -> Bytes {
    let text = r#"(component $guest
  (import "wasi:http/types@0.3.0" (instance $http
    (export "request" (type (sub resource)))
    (export "response" (type (sub resource)))
    (type $dns-payload-fields (record (field "rcode" (option string)) (field "info-code" (option u16))))
    (export "DNS-error-payload" (type $dns-payload (eq $dns-payload-fields)))
    (type $alert-payload-fields (record (field "alert-id" (option u8)) (field "alert-message" (option string))))
    (export "TLS-alert-received-payload" (type $alert-payload (eq $alert-payload-fields)))
    (type $field-size-fields (record (field "field-name" (option string)) (field "field-size" (option u32))))
    (export "field-size-payload" (type $field-size (eq $field-size-fields)))
    (type $error-code-cases (variant
      (case "DNS-timeout") (case "DNS-error" $dns-payload)
      (case "destination-not-found") (case "destination-unavailable")
      (case "destination-IP-prohibited") (case "destination-IP-unroutable")
      (case "connection-refused") (case "connection-terminated") (case "connection-timeout")
      (case "connection-read-timeout") (case "connection-write-timeout") (case "connection-limit-reached")
      (case "TLS-protocol-error") (case "TLS-certificate-error") (case "TLS-alert-received" $alert-payload)
      (case "HTTP-request-denied") (case "HTTP-request-length-required")
      (case "HTTP-request-body-size" (option u64))
      (case "HTTP-request-method-invalid") (case "HTTP-request-URI-invalid") (case "HTTP-request-URI-too-long")
      (case "HTTP-request-header-section-size" (option u32)) (case "HTTP-request-header-size" (option $field-size))
      (case "HTTP-request-trailer-section-size" (option u32)) (case "HTTP-request-trailer-size" $field-size)
      (case "HTTP-response-incomplete")
      (case "HTTP-response-header-section-size" (option u32)) (case "HTTP-response-header-size" $field-size)
      (case "HTTP-response-body-size" (option u64))
      (case "HTTP-response-trailer-section-size" (option u32)) (case "HTTP-response-trailer-size" $field-size)
      (case "HTTP-response-transfer-coding" (option string)) (case "HTTP-response-content-coding" (option string))
      (case "HTTP-response-timeout") (case "HTTP-upgrade-failed") (case "HTTP-protocol-error")
      (case "loop-detected") (case "configuration-error") (case "internal-error" (option string))))
    (export "error-code" (type $error-code (eq $error-code-cases)))))
  (alias export $http "request" (type $request))
  (alias export $http "response" (type $response))
  (alias export $http "error-code" (type $error-code))
  (core module $main-module
    (memory (export "memory") 1)
    (func (export "handle") (param $request i32) (result i32) CODE))
  (core instance $main (instantiate $main-module))
  (alias core export $main "memory" (core memory $memory))
  (func $handle async
    (param "request" (own $request)) (result (result (own $response) (error $error-code)))
    (canon lift (core func $main "handle") (memory $memory)))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/handler@0.3.0" (instance $handler)))"#;
    wat::parse_str(text.replace("CODE", code)).unwrap().into()
}

async fn guest(code: &str) -> Guest {
    let mut guest = Guest::new("hello.wat").await;
    guest.code = handler(code);
    guest
}

async fn fault(guest: Guest) -> Fault {
    guest.get("/").await.unwrap_err()
}

#[tokio::test]
async fn a_guest_that_burns_cpu_is_stopped() {
    let guest = guest("(loop (br 0)) unreachable").await.limits(|limits| limits.cpu_ms = 100);
    assert_eq!(fault(guest).await, Fault::Guest(GuestFault::ExceededCpu));
}

#[tokio::test]
async fn a_guest_that_burns_is_stopped_at_the_wall_too() {
    let guest = guest("(loop (br 0)) unreachable").await.limits(|limits| {
        limits.cpu_ms = 60_000;
        limits.wall_ms = 100;
    });
    assert_eq!(fault(guest).await, Fault::Guest(GuestFault::ExceededWall));
}

#[tokio::test]
async fn a_trap_is_a_fault() {
    assert_eq!(fault(guest("unreachable").await).await, Fault::Guest(GuestFault::Trap));
}

#[tokio::test]
async fn a_guest_that_hoards_memory_is_stopped() {
    let hoard = "(loop (br_if 0 (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable";
    let guest = guest(hoard).await.limits(|limits| limits.memory_bytes = 8 << 20);
    assert_eq!(fault(guest).await, Fault::Guest(GuestFault::ExceededMemory));
}

#[tokio::test]
async fn an_error_code_is_a_fault() {
    // result: 1 is an error, its payload at 8 is case 36, loop-detected.
    let refuse = "(i32.store8 (i32.const 0) (i32.const 1)) (i32.store8 (i32.const 8) (i32.const 36)) (i32.const 0)";
    assert_eq!(fault(guest(refuse).await).await, Fault::Guest(GuestFault::ErrorCode));
}
