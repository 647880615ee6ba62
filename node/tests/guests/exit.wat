;; Leaves by `wasi:cli/exit`, with success, in place of an answer.
(component $guest
  (import "wasi:cli/exit@0.2.0" (instance $cli-exit
    (export "exit" (func (param "status" (result))))
  ))
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core func $exit (canon lower (func $cli-exit "exit")))

  (core module $main-module
    (import "host" "exit" (func $exit (param $is-error i32)))

    (func (export "handle") (param $request i32) (param $out i32)
      (call $exit (i32.const 0))
      unreachable)
  )
  (core instance $main (instantiate $main-module
    (with "host" (instance
      (export "exit" (func $exit))
    ))
  ))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
