;; Never answers: blocks on a host timer of one hour, using no CPU meanwhile, and then traps.
(component $guest
  (import "wasi:io/poll@0.2.0" (instance $io-poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))
  ))
  (alias export $io-poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer $guest $pollable (type $pollable-outer))
    (export "pollable" (type $pollable (eq $pollable-outer)))
    (type $nanoseconds u64)
    (export "duration" (type $duration (eq $nanoseconds)))
    (export "subscribe-duration" (func (param "when" $duration) (result (own $pollable))))
  ))
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core func $subscribe (canon lower (func $clock "subscribe-duration")))
  (core func $block (canon lower (func $io-poll "[method]pollable.block")))

  (core module $main-module
    (import "host" "subscribe" (func $subscribe (param $nanoseconds i64) (result i32)))
    (import "host" "block" (func $block (param $pollable i32)))
    (func (export "handle") (param $request i32) (param $out i32)
      (call $block (call $subscribe (i64.const 3600000000000)))
      unreachable)
  )
  (core instance $main (instantiate $main-module
    (with "host" (instance
      (export "subscribe" (func $subscribe))
      (export "block" (func $block))
    ))
  ))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
