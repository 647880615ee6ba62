;; Grows a table by 1,000 entries at a time until the host refuses, then traps.
(component $guest
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core module $main-module
    (table $entries 1 funcref)
    (func (export "handle") (param $request i32) (param $out i32)
      (loop $more
        (br_if $more (i32.ne (table.grow $entries (ref.null func) (i32.const 1000)) (i32.const -1))))
      unreachable)
  )
  (core instance $main (instantiate $main-module))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
